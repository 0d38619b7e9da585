"""Parts of the web page: components with their handlers."""
