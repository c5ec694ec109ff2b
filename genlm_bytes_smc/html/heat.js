// A coloured text that has the focus is read character by character with the arrow keys.
for(const box of document.querySelectorAll('[data-heat]')){
const told=box.parentNode.querySelector('output');let at=-1;
const go=to=>{const all=box.querySelectorAll('span');if(!all.length)return;
if(all[at])all[at].classList.remove('gbs-at');at=Math.min(Math.max(to,0),all.length-1);
all[at].classList.add('gbs-at');all[at].scrollIntoView({block:'nearest'});
told.textContent=(at+1)+' of '+all.length+': “'+all[at].textContent+'” '+all[at].title;};
box.addEventListener('keydown',e=>{const to={ArrowLeft:at-1,ArrowRight:at+1,Home:0,End:1e9}[e.key];
if(to!==undefined){go(to);e.preventDefault();}});
box.addEventListener('click',e=>{const s=e.target.closest('span');
if(s)go([...box.querySelectorAll('span')].indexOf(s));});}
