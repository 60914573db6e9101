"""The web page: index.html, style.css, app.js, icon.svg, as they are sent."""
