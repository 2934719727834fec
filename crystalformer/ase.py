"""Trained models in ase: `cf.ase.Calculator`. Needs the extra [data]; imported when it is first asked for."""

from .app.calculator import Calculator

__all__ = ["Calculator"]
