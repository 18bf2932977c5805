"""The four papers' tables on images at hand: plans of rows, running them one by one, and the page that shows them."""
