"""One institution's round, and its way to the trunk."""
