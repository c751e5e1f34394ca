"""How the samples of a batch are laid out for a forward of the trained model, and which layouts a model can take."""
