"""A pytest plugin, `-p tests.triton.once`: Triton's interpreter puts its own functions in place once a launch.

It does so at each call of a function within a kernel too, where it looks through the whole of `triton.language`: more
than half of its time.
"""

from typing import Any

from triton.runtime import interpreter

patch_all = interpreter._patch_lang
Scope: Any = interpreter._LangPatchScope
patched: set[int] = set()  # namespaces of functions, in the launch that runs


class Launch(Scope):
    """Of the first call, which is the launch: the interpreter takes back this one alone."""

    def restore(self) -> None:
        """As before; the next launch begins anew."""
        patched.clear()
        super().restore()


def patch_once(fn: Any) -> Any:
    """What `_patch_lang` does, unless a function of the same module has been called in this launch."""
    if id(fn.__globals__) in patched:
        return Scope()
    patched.add(id(fn.__globals__))
    return patch_all(fn)


interpreter._LangPatchScope, interpreter._patch_lang = Launch, patch_once
