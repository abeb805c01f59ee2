"""Models and data of the demonstrations, taken out of other packages' wheels; core asks for each by its name."""
