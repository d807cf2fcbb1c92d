"""The demo models, how they were made, and the demo itself."""
