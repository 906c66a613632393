"""What examples call, read from their source and held against the library without running it."""

import ast
import importlib
import inspect


def unknown(source):
    """Imports from the library that are not there, and arguments that its functions do not take."""
    tree, known, wrong = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "jaxmpc":
            module = importlib.import_module(node.module)
            for alias in node.names:
                if hasattr(module, alias.name):
                    known[alias.asname or alias.name] = getattr(module, alias.name)
                else:
                    wrong.append(f"{node.module}.{alias.name}")
    assert known, "an example of this library uses it"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = known.get(node.value.id)
            if inspect.ismodule(owner) and not hasattr(owner, node.attr):
                wrong.append(f"{node.value.id}.{node.attr}")
        if isinstance(node, ast.Call):
            call = node.func
            if isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name):
                function = getattr(known.get(call.value.id), call.attr, None)
            else:
                function = known.get(call.id) if isinstance(call, ast.Name) else None
            if callable(function):
                wrong += [f"{ast.unparse(call)}: {problem}" for problem in refused(function, node)]
    return wrong


def refused(function, call):
    """Why the function's signature does not take the call, if it does not."""
    if any(isinstance(a, ast.Starred) for a in call.args) or None in (k.arg for k in call.keywords):
        return []  # as many as there are, when it runs
    try:
        inspect.signature(function).bind(*call.args, **{k.arg: k for k in call.keywords})
    except TypeError as error:
        return [str(error)]
    return []
