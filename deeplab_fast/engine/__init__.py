"""Running models over images: prediction and the files it writes."""
