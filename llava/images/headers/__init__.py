"""What image files say of themselves, read under caps before any decoder sees them."""
