"""Order of the tests."""

def pytest_collection_modifyitems(items):
    """Tests of the trained miniature come last: it is trained meanwhile."""
    items.sort(key=lambda item: "mini" in item.fixturenames)
