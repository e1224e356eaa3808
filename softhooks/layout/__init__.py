"""The positions of virtual tokens in the text: from templates over the fields of a data set, or inserted into tokenized rows."""
