"""The comparison of training on whole dialogues with block training: its statistics and its page."""
