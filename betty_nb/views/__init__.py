"""Text, HTML, SVG and figures from records; no widget."""
from .graph import graph_svg, layout
from .palette import OKABE_ITO, level_styles
from .report import dashboard_html, report_html
from .tables import Html, comparison_html, methods_html, record_html, sets_html, table_html
