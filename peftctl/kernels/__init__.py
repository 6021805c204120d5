"""The fast parts under the waist, each with a plain twin it is tested against."""
