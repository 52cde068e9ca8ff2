"""Teachers: frozen image-text models that name regions, of this package or of others."""
