"""Data sets, a module each: `NAME`, `add_arguments` and `convert`; llava.data.convert finds them."""
