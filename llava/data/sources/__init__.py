"""One module per data set: each adds its flags and returns a `llava.data.conversion.Conversion`."""
