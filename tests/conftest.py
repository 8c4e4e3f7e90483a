from tests.browser import chrome, lab, open_notebook  # noqa: F401  fixtures
