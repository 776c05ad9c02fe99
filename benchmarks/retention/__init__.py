"""What a pretrained language model keeps of what it knew while it learns, method by method."""
