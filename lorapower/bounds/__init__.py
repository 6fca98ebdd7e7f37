"""Rank thresholds and error bounds, each with the statement of the book that proves it."""

from .linear import error_matrix, error_rank, linear_error, linear_threshold, rounding_scale

__all__ = ["error_matrix", "error_rank", "linear_error", "linear_threshold", "rounding_scale"]
