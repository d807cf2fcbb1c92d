"""What a deployment chooses: the file and where its values come from, plugins and the slots that they fill, failures contained."""
