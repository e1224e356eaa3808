"""Where virtual tokens go among the text: in templates over the fields of a data set, or inserted into tokenized batches."""
