"""Pictures of what the model sees and of what a run did."""
