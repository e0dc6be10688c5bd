"""A Hugging Face model -> the two ends, the trunk, the surrogate, the adapters. Knows no party."""
