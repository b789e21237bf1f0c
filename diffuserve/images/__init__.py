"""Pictures: what is read, decoded, checked, shown and written."""
