// Steps through the ancestry. A node is a row of a part (the steps between two resamplings).
const $=id=>document.getElementById(id),at=$('at'),tree=$('tree'),parts=run.parts,
steps=parts[parts.length-1].e,y=row=>row*run.dy+18,x=(step,k)=>run.left+step*run.dx+k*run.gap;
let row=0;
const partAt=t=>parts.findIndex(p=>t<p.e),
childrenOf=(k,r)=>k+1<parts.length?parts[k+1].p.flatMap((q,c)=>q===r?[c]:[]):[];
// The final weight and number of what descends from each row.
const descend=parts.map(p=>p.i.map(()=>[0,0]));
{const k=parts.length-1,p=parts[k];
p.i.forEach((_,r)=>{const w=p.w[r]&&p.w[r][p.w[r].length-1];
descend[k][r]=[p.k[r]==='1'?1:0,typeof w==='number'?Math.exp(w):0];});
for(let j=k;j>0;j--)parts[j].p.forEach((q,c)=>{if(q>=0){descend[j-1][q][0]+=descend[j][c][0];
descend[j-1][q][1]+=descend[j][c][1];}});}
// The text of a row until step t, as bytes.
function bytesOf(t,r){const got=[];for(let k=partAt(t);k>=0&&r>=0;r=parts[k].p[r],k--){
const p=parts[k],s=p.s[r]||'';for(let i=Math.min(t,p.e-1)-p.b;i>=0;i--){const d=s.slice(2*i,2*i+2);
if(d!=='--'&&d!=='##'&&d)got.push(parseInt(d,16));}}return new Uint8Array(got.reverse());}
const seen=s=>s.replace(/[\p{C}\p{Zl}\p{Zp}]/gu,c=>JSON.stringify(c).slice(1,-1)
.replace(/[^\x20-\x7e]/gu,d=>'\\u{'+d.codePointAt(0).toString(16)+'}'));
const text=(t,r)=>seen(new TextDecoder().decode(bytesOf(t,r)));
const short=s=>s.length>1000?s.slice(0,1000)+'…':s;
const shown=p=>p===0||p>=0.001?p.toFixed(4):p.toExponential(1);
const weight=(t,r)=>{const p=parts[partAt(t)],w=p.w[r][t-p.b];return typeof w==='number'?Math.exp(w):0;};
// The lines from the beginning to a node, and from it to all that descend from it.
function lineage(k,r){let d='';
const line=(j,q)=>{const p=parts[j],over=stop(p,q);
const to=over<0?p.e:p.b+over+.9;
if(j>0&&p.p[q]>=0)d+=`M${x(p.b,j-1)} ${y(p.p[q])}L${x(p.b,j)} ${y(q)}`;
d+=`M${x(p.b,j)} ${y(q)}H${x(to,j)}`;},
down=(j,q)=>{for(const c of childrenOf(j,q)){if(!lives(j+1,c))continue;line(j+1,c);down(j+1,c);}};
for(let j=k,q=r;j>=0&&q>=0;q=parts[j].p[q],j--)if(lives(j,q))line(j,q);
const above=d;d='';down(k,r);return [above,d];}
function stop(p,q){if(!run.recorded)return -1;const s=p.s[q];
for(let i=0;i<p.e-p.b;i++){const d=s.slice(2*i,2*i+2);
if(d==='##'||(d!=='--'&&p.w[q][i]===null))return i;}return -1;}
const livesMemo=new Map();
function lives(k,r){if(k===0||!run.recorded)return true;const key=k+','+r;
if(!livesMemo.has(key)){const q=parts[k].p[r];
livesMemo.set(key,q<0||(lives(k-1,q)&&stop(parts[k-1],q)<0));}return livesMemo.get(key);}
function cell(to,kind,content){const c=to.insertCell();c.className=kind;c.append(content);}
function table(t){const p=parts[partAt(t)],all=new Map();
p.i.forEach((_,r)=>{const key=bytesOf(t,r).join(),e=all.get(key)||[0,0,r,false];
e[0]+=weight(t,r);e[1]++;e[3]=e[3]||r===row;all.set(key,e);});
const sorted=[...all.values()].sort((a,b)=>b[0]-a[0]),most=sorted[0][0]||1;$('now').replaceChildren();
for(const [w,n,r,chosen] of sorted.slice(0,60)){const tr=$('now').insertRow();
if(chosen)tr.className='chosen';cell(tr,'n',shown(w));
const i=document.createElement('i');i.style.setProperty('--a',100*w/most+'%');
i.style.setProperty('--p',100*w+'%');
i.style.setProperty('--l',100*Math.max(0,1+Math.log10(Math.max(w/most,1e-300))/6)+'%');
cell(tr,'bar',i);cell(tr,'n',n);
const c=document.createElement('code');c.textContent=short(text(t,r));cell(tr,'',c);}
$('texts-at').textContent='Step '+(run.first+t+1)+': '+all.size+(all.size===1?' text':' texts')+
(all.size>60?', of which 60 are shown':'')+
(t+1===p.e&&t+1<steps?', then resampled.':'.');}
function tell(t){const k=partAt(t),p=parts[k],[n,w]=descend[k][row];
let said='Particle '+p.i[row]+' at step '+(run.first+t+1);
if(run.recorded){const d=p.s[row].slice(2*(t-p.b),2*(t-p.b)+2),over=stop(p,row);
said+=d==='##'?': its text ends':d==='--'||(over>=0&&t-p.b>over)||!lives(k,row)?': reads nothing any more':
': reads '+(d>='20'&&d<'7f'?'“'+String.fromCharCode(parseInt(d,16))+'”':'byte '+d);
if(d!=='--'&&p.w[row][t-p.b]===null)said+=' and dies';
said+='; '+shown(weight(t,row))+' of the weight';}
if(k>0&&p.p[row]>=0)said+='; copied from particle '+parts[k-1].i[p.p[row]]+' after step '+(run.first+p.b);
said+='; '+(n===0?'no final particle of weight descends':n===1?'one final particle of weight descends':
n+' final particles of weight descend')+(run.recorded&&n?', with '+shown(w)+' of the weight':'')+'.';
$('who').replaceChildren(said);
if(run.recorded){const c=document.createElement('code');c.textContent=short(text(t,row));
$('who').append(document.createElement('br'),c);}}
let told=-1;
function show(move){const t=+at.value-1,k=partAt(t);
row=Math.min(Math.max(row,0),parts[k].i.length-1);
$('now-at').setAttribute('x',x(t,k));$('row-at').setAttribute('y',y(row)-16);
const [above,below]=lineage(k,row);$('hot').setAttribute('d',above);$('heirs').setAttribute('d',below);$('step').textContent='step '+(run.first+t+1)+' of '+(run.first+steps);
at.setAttribute('aria-valuetext','step '+(run.first+t+1));
if(move){const f=$('frame');const a=x(t,k);if(a<f.scrollLeft+30||a>f.scrollLeft+f.clientWidth-40)
f.scrollLeft=a-f.clientWidth/2;}
tell(t);if(run.recorded)table(t);}
// Goes to step t and stays on the line: a descendant forwards, the ancestor backwards.
function go(t){t=Math.min(Math.max(t,0),steps-1);let k=partAt(told<0?t:told);const to=partAt(t);
for(;k<to;k++){const c=childrenOf(k,row);if(c.length)row=c.find(r=>parts[k+1].k[r]==='1')??c[0];}
for(;k>to;k--)if(parts[k].p[row]>=0)row=parts[k].p[row];
told=t;at.value=t+1;show(true);}
document.querySelectorAll('[data-go]').forEach(b=>{b.onclick=()=>go({first:0,back:told-1,on:told+1,last:steps-1}[b.dataset.go]);});
tree.addEventListener('keydown',e=>{const t=told,k=partAt(t),n=parts[k].i.length;
const keys={ArrowLeft:()=>go(t-1),ArrowRight:()=>go(t+1),Home:()=>go(0),End:()=>go(steps-1),
ArrowUp:()=>{row=Math.max(0,row-1);show();},ArrowDown:()=>{row=Math.min(n-1,row+1);show();}};
if(keys[e.key]){keys[e.key]();e.preventDefault();}});
function point(e){const b=tree.getBoundingClientRect(),
a=e.clientX-b.left,k=Math.max(0,parts.findLastIndex((p,j)=>a>=x(p.b,j)-run.gap/2)),p=parts[k],
t=Math.min(Math.max(Math.floor((a-x(0,k))/run.dx),p.b),p.e-1),
r=Math.floor((e.clientY-b.top-2)/run.dy);
if(r<0||r>=parts[partAt(t)].i.length||(t===told&&r===row))return;
told=t;row=r;at.value=t+1;show();}
tree.addEventListener('mousemove',point);tree.addEventListener('click',point);
at.max=steps;at.oninput=()=>go(at.value-1);
{const last=descend[parts.length-1];row=last.reduce((b,d,r)=>d[1]>last[b][1]?r:b,0);}
told=steps-1;at.value=steps;go(Math.ceil(steps/2)-1);$('frame').scrollLeft=0;
