"""What tests require outside of test modules."""


def require(condition: object, *found: object) -> None:
    """An AssertionError that says what was found, unless the condition holds.

    For the helpers and scripts of the tests: pytest rewrites the asserts of test modules, so that they are
    executed under `python -O` too; elsewhere Python drops them there.
    """
    if not condition:
        raise AssertionError(*found)
