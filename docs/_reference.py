"""The API reference: a line such as `::: optimorph.codecs.*` stands for all public names there."""

import inspect
import re

import optimorph

_PATTERN = re.compile(r"^::: optimorph\.(\w+)\.\*$", re.M)


def on_page_markdown(markdown, **kwargs):
    """A table with a line for each name, and then every name."""
    return _PATTERN.sub(lambda found: _expanded(found[1]), markdown)


def _expanded(module):
    objects = _public(module)
    rows = [
        f"| [`{name.split('.')[-1]}`][{name}] | {inspect.getdoc(thing).splitlines()[0].rstrip(':')} |\n"
        for name, thing in objects.items()
        if inspect.isroutine(thing)
    ]
    table = "| name | in one line |\n|---|---|\n" + "".join(rows) if rows else ""
    return "\n\n".join([table, *(f"::: {name}" for name in objects)])


def _public(module):
    """Those of a public module, or those of `optimorph` that a private one defines; types come last."""
    if not module.startswith("_"):
        inside = getattr(optimorph, module)
        return {f"optimorph.{module}.{name}": getattr(inside, name) for name in inside.__all__}
    everything = {f"optimorph.{name}": getattr(optimorph, name) for name in optimorph.__all__}
    own = {
        name: thing
        for name, thing in everything.items()
        if f"{getattr(thing, '__module__', '')}.".startswith(f"optimorph.{module}.")
    }
    return dict(sorted(own.items(), key=lambda item: inspect.isclass(item[1])))
