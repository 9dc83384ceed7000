"""matplotlib, where it is installed."""
from plumbing.flags import UserError


def pyplot():
    """matplotlib's, drawing into files. UserError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("the pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
    })
    return plt
