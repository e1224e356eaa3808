"""The prompted model as a part of something else: in a wider module, in a saved model, beside itself, in a checkpoint."""
