"""Studies that compare jaxmpc with other implementations: ``python -m bench --help``."""
