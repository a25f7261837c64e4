"""What other libraries bring: models, data and texts. Each needs an extra, imported only on use."""
