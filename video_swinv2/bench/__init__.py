"""How fast is it here, beside its peers? One benchmark per file, all measured the same way."""
