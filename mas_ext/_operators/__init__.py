"""How the operators are declared, checked, registered and loaded."""
