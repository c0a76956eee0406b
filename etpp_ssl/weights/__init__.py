"""Everything that brings tensors in: files of ours and of others, read, recognised, adapted, loaded."""
