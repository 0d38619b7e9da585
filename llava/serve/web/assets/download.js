(text) => {
  const {name, kind, content} = JSON.parse(text);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], {type: kind}));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}
