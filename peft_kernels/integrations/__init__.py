"""Ways in from other libraries. Each is imported when it is first asked for, so that `import peft_kernels`
needs none of them: `pk.integrations.peft` needs PEFT, `pk.integrations.transformers` transformers."""

import importlib

_PACKAGES = ("peft", "transformers")


def __getattr__(name: str):
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PACKAGES])
