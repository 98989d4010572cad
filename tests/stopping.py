"""Runs that are stopped at a chosen call, to see what is left and how the next one goes on."""


def before(monkeypatch, owner, name, how, count=1):
    """Calls `how` in front of the `count`th call of a function of the next run."""
    original, calls = getattr(owner, name), []

    def stopping(*arguments, **options):
        calls.append(name)
        if len(calls) == count:
            how()
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, stopping)


def after(monkeypatch, owner, name, how):
    """Calls `how` behind every call."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **o: (original(*a, **o), how())[0])
