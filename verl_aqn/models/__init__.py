"""The layout of the samples of a batch in a forward of the trained model, and the layouts that a model supports."""
