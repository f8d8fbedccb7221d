"""Measuring, tables and reports; knows no model and no peer."""
