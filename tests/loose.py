"""The one place where tests leave types: `Any` under two names that say why."""

from typing import Any, TypeAlias

Json: TypeAlias = Any
"""What a JSON document holds: answers, configurations, schemas.

Tests read them many levels deep, by the very keys that they check. A type for each document would say every
expectation twice, and a key that is not there fails the test as it is.
"""

Field: TypeAlias = Any
"""The value of a field that a helper hands on by its name.

Its type is that of the field: the class that is made of it says so, and is called whenever the helper is.
"""
