"""In and out: our own folder format (native), Hugging Face folders (transformers), what a command line names."""
