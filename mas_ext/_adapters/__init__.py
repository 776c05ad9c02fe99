"""LoRA adapters whose update of a weight is protected as a whole: ``adapters="merged"``."""
