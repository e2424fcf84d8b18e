"""What an exported folder carries where transformers has no stock class: copied as it is, so it imports
nothing of this project."""
