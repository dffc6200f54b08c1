"""What happens when features are pushed: edits of the residual stream while a language model writes."""

from fastsae.steering.edits import Edit
from fastsae.steering.steering import Steering, steer

__all__ = ["Edit", "Steering", "steer"]
