"""The web page as it is sent: index.html, two style sheets, an icon, and modules from app.js on."""
