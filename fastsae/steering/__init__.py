"""What happens when features are pushed: edits of the residual stream while a language model writes."""
