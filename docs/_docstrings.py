"""The sections `Equals:` and `References:` of docstrings as lists, and arguments that are unpacked."""

import re

import griffe

_SECTION = re.compile(r"^( *)(Equals|References):\n((?:\1  .*\n?)+)", re.M)


class Sections(griffe.Extension):
    """Rewrite both sections before the docstring is parsed."""

    def on_object(self, *, obj, **kwargs):
        """Of every module, class and function that has a docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _SECTION.sub(_as_list, obj.docstring.value)


class Unpacked(griffe.Extension):
    """The keys of `**arguments: Unpack[SomeTypedDict]`, and of the classes that it extends, as arguments."""

    def on_function(self, *, func, **kwargs):
        """Replace the parameter in the signature."""
        for given in [*func.parameters]:
            if given.kind is griffe.ParameterKind.var_keyword and "Unpack[" in str(given.annotation):
                keys = func.modules_collection[given.annotation.slice.canonical_path]
                del func.parameters[given.name]
                for each in (*reversed(keys.mro()), keys):
                    for name, key in each.attributes.items():
                        func.parameters[name] = griffe.Parameter(
                            name,
                            annotation=key.annotation,
                            kind=griffe.ParameterKind.keyword_only,
                            default="None",
                        )


def _as_list(match):
    indent, title, body = match.groups()
    if title == "References":
        items = [" ".join(body.split())]
    else:  # a line that is indented further goes on with the call before it
        calls = re.split(rf"\n(?={indent}  \S)", body.rstrip())
        items = [_call(" ".join(call.split())) for call in calls]
    return f"{indent}**{title}:**\n\n" + "".join(f"{indent}- {item}\n" for item in items) + "\n"


def _call(text):
    """The call as code, and what is written behind it as text; only text if there is no call."""
    depth = 0
    for k, mark in enumerate(text):
        depth += (mark == "(") - (mark == ")")
        if mark == ")" and depth == 0:
            return f"`{text[: k + 1]}`{text[k + 1 :]}"
    return text
