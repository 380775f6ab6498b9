"""Programs that show farspan at work; each runs by itself."""
