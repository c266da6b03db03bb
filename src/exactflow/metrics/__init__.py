"""Numbers about models and samples."""
