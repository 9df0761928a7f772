"""The methods as classes: constructor and docstring; the mathematics is in `estimators`."""
